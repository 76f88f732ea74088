"""Every point of OpenRLHF that rlplugins replaces or calls, as it was in the version that was tested.

OpenRLHF has no extension point for any of this, so most are replaced: in the process that the user starts by `install`, in the
trainer's process by the `fit` that travels there, in all others by the handshake; always on the one object that the run
uses, except for the two functions of modules, which take none.
"""

from __future__ import annotations

from rlplugins.bindings import Point

AGENT, MODEL = "utils/agent.py", "models/actor.py"
LAUNCHER = "trainer/ray/launcher.py"
TRAINER = "trainer/ppo_trainer.py"
AHEAD = "trainer/ppo_trainer_async.py"
SAMPLES = "trainer/ppo_utils/samples_generator.py"
MAKER = "trainer/ppo_utils/experience_maker.py"
EXPERIENCE = "trainer/ppo_utils/experience.py"
BUFFER = "trainer/ppo_utils/replay_buffer.py"
ENGINE = "trainer/ray/vllm_engine.py"
ACTOR, CRITIC = "trainer/ray/ppo_actor.py", "trainer/ray/ppo_critic.py"
PAIRS, DPO = "datasets/reward_dataset.py", "trainer/dpo_trainer.py"

FORWARD = (
    "(sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs, ring_attn_group, "
    "packed_seq_lens, return_entropy, **mm_inputs)"
)

POINTS = (
    Point("utils/config.py", "hierarchize", "(args)", "patched", "start: the stack is checked against the flags"),
    Point(TRAINER, "PPOTrainer.fit", "(global_step)", "patched", "start: travels to the trainer's process and binds it"),
    Point(AHEAD, "TrainingActor.fit", "(global_step)", "patched", "start: the same, generation ahead"),
    Point(AHEAD, "GenerateSamplesActor.fit", "(episode, total_consumed_prompts)", "patched", "start: the same"),
    Point(TRAINER, "prepare_datasets", "(strategy, tokenizer)", "called", "trainer: the pool, generation ahead"),
    Point("datasets/utils.py", "blending_datasets",
          "(datasets, probabilities, strategy, seed, max_count, stopping_strategy, dataset_split)", "called",
          "trainer: columns of the prompt file that the data set drops"),
    Point("datasets/prompts_dataset.py", "preprocess_data",
          "(data, input_template, input_key, label_key, apply_chat_template)", "called", "trainer: rewritten prompts"),
    Point("datasets/prompts_dataset.py", "PromptDataset.__getitem__", "(idx)", "called", "trainer: chosen prompts"),
    Point(SAMPLES, "_collect_prompt_batch", "(dataloader_iter, num_prompts)", "patched",
          "trainer: choose_prompts, allocate_rollouts, rewrite_prompts, sampling_params"),
    Point(SAMPLES, "SamplesGenerator._dispatch_prompts_to_vllm", "(prompts, labels, *, images, **generate_kwargs)", "patched",
          "trainer: unequal numbers of responses"),
    Point(SAMPLES, "SamplesGenerator.generate_samples", "(**generate_kwargs)", "patched",
          "trainer: extend_rollouts, filter_rollouts"),
    Point(SAMPLES, "SamplesGenerator._process_response_into_experience", "(response, **generate_kwargs)", "called",
          "trainer: engine.generate, engine.given"),
    Point(MAKER, "RemoteExperienceMaker.make_experience_batch", "(rollout_samples)", "patched",
          "trainer: columns and shared values of the update, rows that fill mini-batches"),
    Point(MAKER, "RemoteExperienceMaker.make_experience", "(samples_list)", "patched", "trainer: entropies of the passes"),
    Point(MAKER, "RemoteExperienceMaker.compute_advantages_and_returns", "(experiences)", "patched",
          "trainer: hooks of the credit phase"),
    Point("trainer/ppo_utils/length_penalty.py", "apply_length_penalties", "(experiences, args)", "called",
          "trainer: penalties that the flags ask for"),
    Point(EXPERIENCE, "split_experience_batch", "(experience)", "called", "trainer: equal shares of the ranks"),
    Point(EXPERIENCE, "make_experience_batch", "(items, packing_samples)", "called", "trainer: the same"),
    Point(TRAINER, "BasePPOTrainer.init_checkpoint_states", "()", "patched", "trainer: handshakes, plugin state"),
    Point(TRAINER, "BasePPOTrainer.train_step", "(rollout_samples, global_step)", "patched", "trainer: on_step_end"),
    Point(TRAINER, "BasePPOTrainer._compute_rollout_stats", "(experiences)", "patched", "trainer: without rows that fill"),
    Point(TRAINER, "BasePPOTrainer.save_logs_and_checkpoints", "(global_step, logs_dict, client_states)", "patched",
          "trainer: plugin state"),
    Point(TRAINER, "BasePPOTrainer.save_best_checkpoint", "(eval_metrics, global_step, client_states)", "patched",
          "trainer: on_validation, plugin state"),
    Point(LAUNCHER, "RayActorGroup.async_run_method_batch", "(method_name, **kwargs)", "called",
          "trainer: engine.log_probs"),
    Point(AGENT, "AgentExecutorBase.execute",
          "(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)", "patched",
          "engine: rewritten prompts, forced prefixes, sampling parameters, given responses: wrapped on the engine's executor"),
    Point(AGENT, "SingleTurnAgentExecutor.__init__", "(remote_rm_url)", "called", "trainer: engine.given without a reward"),
    Point(AGENT, "SingleTurnAgentExecutor.execute",
          "(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)", "called", "trainer: the same"),
    Point(ENGINE, "RolloutRayActor.__init__",
          "(*args, bundle_indices, agent_func_path, remote_rm_url, mm_pad_token_ids, **kwargs)", "patched",
          "start: process_logits: two more of the options that OpenRLHF's start hands on to vLLM"),
    Point(ENGINE, "RolloutRayActor.generate", "(prompt_token_ids, sampling_params, multi_modal_data)",
          "called", "engine: forced prefixes; given responses stand for what it returns"),
    Point(ENGINE, "batch_vllm_engine_call", "(engines, method_name, *args, rank_0_only, **kwargs)",
          "called", "trainer: engines that sleep are woken for engine.generate"),
    Point("utils/loss_utils.py", "iter_grad_accum_global_norm", "(data_iter, strategy, accumulated_gradient, mask_fn)",
          "patched", "actor and critic: prepare_mini_batch; in the modules of both trainers"),
    Point(BUFFER, "NaiveReplayBuffer.__getitem__", "(idx)", "patched",
          "actor: rows kept together: the buffer's own list of micro-batches is set before every update"),
    Point(ACTOR, "ActorPPOTrainer.ppo_train", "(kl_ctl)", "patched", "actor: metrics of the update"),
    Point(ACTOR, "ActorPPOTrainer.training_step", "(experience, kl_ctl, step, loss_batch_info)", "patched",
          "actor: the KL term is the stack's"),
    Point("models/loss.py", "PolicyLoss.forward",
          "(log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size, batch_num_tokens, "
          "global_batch_size)", "patched", "actor: the loss"),
    Point("models/loss.py", "ValueLoss.forward",
          "(values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size)", "patched",
          "critic: targets and weights of its loss"),
    Point(CRITIC, "CriticPPOTrainer.training_step", "(experience, step, loss_batch_info)", "called", "critic: its step"),
    Point(MODEL, "Actor.forward", FORWARD, "official", "actor: entropies, by forward hooks"),
    Point(MODEL, "Actor.forward", FORWARD, "patched",
          "actor and reference: the hook forward; called on the bare model for engine.gradient_products"),
    Point(PAIRS, "RewardDataset.__init__",
          "(dataset, tokenizer, max_length, strategy, input_template, is_dpo, num_processors)", "patched",
          "train_dpo: columns of the pairs that the data set drops"),
    Point(PAIRS, "RewardDataset.__getitem__", "(idx)", "patched", "train_dpo: where a pair stands"),
    Point(PAIRS, "RewardDataset.process_data", "(data)", "called", "train_dpo: pairs that are left out as too long"),
    Point(DPO, "DPOTrainer.__init__",
          "(model, ref_model, strategy, tokenizer, optim, train_dataloader, eval_dataloader, scheduler, max_norm, beta, "
          "max_epochs, save_hf_ckpt, disable_ds_ckpt)", "patched",
          "train_dpo: all below are replaced on the trainer that it makes; its loader is read one mini-batch ahead"),
    Point(DPO, "DPOTrainer.fit", "(args, consumed_samples, num_update_steps_per_epoch)", "patched", "train_dpo: plugin state"),
    Point(DPO, "DPOTrainer.concatenated_forward", "(model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)", "patched",
          "train_dpo: no pass of the reference but for the mini-batch"),
    Point(DPO, "DPOTrainer._get_batch_logps", "(per_token_logps, attention_mask, prompt_id_lens)", "patched",
          "train_dpo: log-probs of the tokens"),
    Point(DPO, "DPOTrainer.save_logs_and_checkpoints", "(args, global_step, step_bar, logs_dict, client_states)", "patched",
          "train_dpo: metrics, plugin state"),
    Point("models/loss.py", "DPOLoss.forward",
          "(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)", "patched",
          "train_dpo: preference_loss, auxiliary_loss"),
)  # fmt: skip
