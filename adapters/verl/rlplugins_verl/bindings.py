"""Every point of verl that rlplugins binds to or calls, as it was in the version that was tested.

`official`: a registry, an extension point, or a method of a class that verl lets one derive from and register.
`patched`: something of verl's is replaced in place, in a run that asked for a stack.
"""

from __future__ import annotations

from rlplugins.bindings import Point

BASE = "trainer/ppo/v1/trainer_base.py"
FSDP = "workers/engine/fsdp/transformer_impl.py"
POINTS = (
    Point(BASE, "register_trainer", "(name)", "official", "rlplugins_sync, rlplugins_colocate_async"),
    Point(BASE, "PPOTrainer.__init__", "(config)", "official", "the stack is built and checked"),
    Point(BASE, "PPOTrainer._init_dataloader", "()", "official", "pool of prompts, plugin state"),
    Point(BASE, "PPOTrainer.on_init_end", "()", "official", "handshake with the workers"),
    Point(BASE, "PPOTrainer.fit", "(agent_loop_manager)", "official", "handshake with the agent-loop workers"),
    Point(BASE, "PPOTrainer._next_train_batch", "(num_prompts)", "official", "hooks of the prompts"),
    Point(BASE, "PPOTrainer._build_replay_buffer", "()", "official", "extend_rollouts, filter_rollouts"),
    Point(BASE, "PPOTrainer._balance_batch", "(batch, metrics, logging_prefix, keep_minibatch)", "official",
          "prompts together in the passes of `forward`"),
    Point(BASE, "PPOTrainer._compute_advantage", "(batch, metrics)", "official", "hooks of the credit phase"),
    Point(BASE, "PPOTrainer._update_actor", "(batch, metrics)", "official", "columns and shared values of the update"),
    Point(BASE, "PPOTrainer._update_critic", "(batch, metrics)", "official", "value_targets, weights of the critic's loss"),
    Point(BASE, "PPOTrainer._compute_old_log_prob", "(batch, metrics)", "official", "engine.log_probs"),
    Point(BASE, "PPOTrainer._compute_ref_log_prob", "(batch, metrics)", "official", "engine.log_probs of the reference"),
    Point(BASE, "PPOTrainer.on_step_begin", "()", "official", "the step opens, reference_policy"),
    Point(BASE, "PPOTrainer.on_step_end", "()", "official", "on_step_end"),
    Point(BASE, "PPOTrainer._consume_sync_metrics", "()", "official", "metrics"),
    Point(BASE, "PPOTrainer._validate", "()", "official", "on_validation"),
    Point(BASE, "PPOTrainer._save_checkpoint", "()", "official", "plugin state"),
    Point(BASE, "PPOTrainer._load_checkpoint", "()", "official", "plugin state"),
    Point("experimental/agent_loop/agent_loop.py", "register", "(agent_name)", "official", "rewrite_prompts, sampling_params"),
    Point("experimental/agent_loop/agent_loop.py", "AgentLoopBase.run", "(sampling_params, **kwargs)", "official",
          "rewrite_prompts, sampling_params"),
    Point("workers/rollout/llm_server.py", "LLMServerClient.generate",
          "(request_id, *, prompt_ids, sampling_params, image_data, video_data, audio_data, mm_processor_kwargs, **kwargs)",
          "official", "forced response prefixes, given responses"),
    Point("trainer/ppo/v1/agent_loop_tq.py", "AgentLoopWorkerTQ._run_prompt", "(prompt, sampling_params, trajectory, trace)",
          "official", "allocate_rollouts (`__rollout_n__`)"),
    Point("trainer/ppo/v1/agent_loop_tq.py", "AgentLoopManagerTQ.generate_sequences", "(prompts)", "official",
          "engine.generate"),
    Point("workers/utils/padding.py", "no_padding_2_padding", "(tensor, data)", "official", "log-probs of the update"),
    Point("utils/metric/utils.py", "Metric.__init__", "(aggregation, value)", "official", "metrics of the update"),
    Point("trainer/ppo/v1/replay_buffer.py", "ReplayBuffer.sample", "(global_steps, partition_id, batch_size)", "patched",
          "extend_rollouts, filter_rollouts: wrapped on the trainer's own buffer"),
    Point("workers/engine/base.py", "BaseEngine.train_batch", "(data, loss_function)", "patched",
          "prepare_mini_batch and the loss: replaced on the engines of actor and critic"),
    Point("workers/engine/base.py", "BaseEngine.forward_backward_batch", "(data, loss_function, forward_only)", "patched",
          "rows kept together, engine.gradient_products: replaced on the engines of actor and reference"),
    Point("workers/engine/utils.py", "prepare_micro_batches",
          "(data, dp_group, num_batches_divided_by, same_micro_num_in_dp, min_num_micro_batch, use_dynamic_bsz_balance)",
          "patched", "rows kept together: replaced where the FSDP engine calls it, for a batch whose stack needs it"),
    Point(FSDP, "FSDPEngineWithLMHead.forward_step", "(micro_batch, loss_function, forward_only)", "patched",
          "forward: replaced on the engines of actor and reference"),
    Point("workers/engine/utils.py", "detach_tree", "(obj)", "official", "forward"),
    Point(FSDP, "FSDPEngine.train_mode", "(**kwargs)", "official", "engine.gradient_products"),
    Point(FSDP, "FSDPEngine.optimizer_zero_grad", "()", "official", "engine.gradient_products"),
    Point("utils/tensordict_utils.py", "maybe_fix_3d_position_ids", "(data)", "official", "engine.gradient_products"),
    Point("workers/engine/base.py", "BaseEngine.infer_batch", "(data, loss_function)", "official",
          "log-probs of a whole mini-batch"),
    Point("workers/engine_workers.py", "TrainingWorker.train_mini_batch", "(data)", "official", "one call per update"),
    Point("workers/engine_workers.py", "TrainingWorker.train_batch", "(data)", "official", "one call per mini-batch"),
    Point("trainer/main_ppo_v0.py", "TaskRunner.run", "(config)", "patched", "refuses a stack under verl's deprecated trainer"),
)  # fmt: skip

CALLS = (
    (BASE, "PPOTrainer._step_once", "self._balance_batch("),
    (BASE, "PPOTrainer._step_once", "self._compute_advantage("),
    ("workers/engine_workers.py", "TrainingWorker.train_batch", "self.engine.train_batch("),
    ("workers/engine/base.py", "BaseEngine.train_batch", "self.forward_backward_batch("),
    ("workers/engine/base.py", "BaseEngine.infer_batch", "self.forward_backward_batch("),
    (FSDP, "FSDPEngine.forward_backward_batch", "prepare_micro_batches("),
    (FSDP, "FSDPEngine.forward_backward_batch", "self.forward_step("),
    (FSDP, "FSDPEngineWithLMHead.forward_step", '"_autocast_dtype"'),
    (FSDP, "FSDPEngineWithLMHead.forward_step", "loss_function("),
    ("single_controller/base/decorator.py", "dispatch_lazy_compute_data_proto", "worker_group._dispatch_info[mesh_name]"),
    ("experimental/agent_loop/single_turn_agent_loop.py", "SingleTurnAgentLoop.run", "self.server_manager.generate("),
    ("experimental/agent_loop/agent_loop.py", "AgentLoopWorker._compute_score", "reward_score is None"),
)  # fmt: skip
"""File, function, and words in it without which what is replaced would never be asked."""

VLLM_POINTS = (
    Point("v1/sample/logits_processor/interface.py", "LogitsProcessor.__init__", "(vllm_config, device, is_pin_memory)",
          "official", "process_logits"),
    Point("v1/sample/logits_processor/interface.py", "LogitsProcessor.update_state", "(batch_update)", "official",
          "the numbers of each request"),
    Point("v1/sample/logits_processor/interface.py", "LogitsProcessor.apply", "(logits)", "official", "process_logits"),
    Point("v1/sample/logits_processor/builtin.py", "process_dict_updates", "(req_entries, batch_update, new_state)",
          "official", "the numbers of each request"),
)  # fmt: skip
"""The same for vLLM, where it is installed."""
