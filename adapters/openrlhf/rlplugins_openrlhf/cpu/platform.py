"""The CPU in the few places where OpenRLHF, DeepSpeed and vLLM take an accelerator for granted.

Nothing is imported before OpenRLHF imports it: each change is made right after its module. Changed are Ray's dashboard, the
device that `torch.cuda` names, the device mesh, the process group that carries weights from the actor to vLLM (gloo for
NCCL) and the tensor that receives them, vLLM's packing of weights (it frees what the next weights are written to), two
extensions that DeepSpeed would compile, and modules of FlashAttention that OpenRLHF imports without using them.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FLASH = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")


def light(name: str) -> ModuleType:
    """A module of the core that needs no other, without the core itself: that imports torch, and Ray's own processes have
    seconds to start."""
    core = importlib.util.find_spec("rlplugins")
    assert core is not None and core.origin is not None
    specification = importlib.util.spec_from_file_location(f"_{name}", Path(core.origin).with_name(f"{name}.py"))
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Cpu(str):
    """The word that `.to()` and `device=` take, and 0 where a device's number is written into a name."""

    def __format__(self, specification: str) -> str:
        return "0"


def install() -> None:
    """Make every change when its module is imported."""
    after_import = light("imports").after_import
    after_import("torch", name_cpu)
    after_import("ray", no_dashboard)
    after_import("openrlhf.utils.deepspeed.deepspeed", mesh_of_cpus)
    after_import("openrlhf.utils.deepspeed.deepspeed_utils", plain_adam)
    after_import("openrlhf.utils.distributed_util", send_by_gloo)
    after_import("openrlhf.trainer.ray.vllm_worker_wrap", receive_on_cpu)
    after_import("openrlhf.models.actor", attend_plainly)
    after_import("deepspeed.comm.torch", no_shared_memory)
    after_import("vllm.model_executor.layers.utils", keep_weights)
    around_import("openrlhf.models.ring_attn_utils", flash_attention_in_name)


def name_cpu(torch: Any) -> None:
    """`torch.cuda` without a device."""
    if torch.cuda.is_available():
        return
    device = Cpu("cpu")
    torch.cuda.current_device = lambda: device
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)  # one each: torch's compiler tells them apart


def no_dashboard(module: Any) -> None:
    """A Ray of its own without the processes that show it, which cost a small machine half of its start."""
    original = module.init
    module.init = lambda *args, **kwargs: original(*args, **{"include_dashboard": False, **kwargs})


def mesh_of_cpus(module: Any) -> None:
    """The ranks as a mesh of CPUs; the averaged copy of the weights stays where it is."""
    original = module.init_device_mesh
    module.init_device_mesh = lambda device, *args, **kwargs: original("cpu", *args, **kwargs)
    average = module.DeepspeedStrategy.moving_average

    def moving_average(self: Any, model: Any, copy: Any, beta: float = 0.992, device: str = "cpu") -> None:
        average(self, model, copy, beta, "cpu")

    module.DeepspeedStrategy.moving_average = moving_average


def plain_adam(module: Any) -> None:
    """torch's Adam for DeepSpeed's own, which is compiled when it is first used."""
    original = module.get_train_ds_config

    def get_train_ds_config(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        optimizer = config.get("optimizer", {})
        if optimizer.get("type") in ("Adam", "AdamW"):
            optimizer["params"]["torch_adam"] = True
        return config

    module.get_train_ds_config = get_train_ds_config


def no_shared_memory(module: Any) -> None:
    """DeepSpeed communicates through gloo alone; its own operation is compiled when it is first used."""
    module.build_shm_op = lambda: None


class GlooGroup:
    """A group of the actor and the engines, with the one method that OpenRLHF calls on vLLM's NCCL communicator."""

    def __init__(self, host: str, port: int, rank: int, size: int) -> None:
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group

        self.group = stateless_init_torch_distributed_process_group(host, port, rank, size, backend="gloo")

    def broadcast(self, tensor: Any, src: int = 0, stream: Any = None) -> Any:
        """`tensor` of rank `src` to all."""
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.group.broadcast([tensor], options).wait()
        return tensor


def send_by_gloo(module: Any) -> None:
    """The group that carries weights."""

    def stateless_init_process_group(host: str, port: int, rank: int, size: int, device: Any) -> GlooGroup:
        return GlooGroup(host, port, rank, size)

    module.stateless_init_process_group = stateless_init_process_group


def receive_on_cpu(module: Any) -> None:
    """The engine's side of it."""

    def update_weight(self: Any, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
        import torch

        weight = torch.empty(shape, dtype=dtype)
        self._model_update_group.broadcast(weight, src=0)
        self.model_runner.model.load_weights(weights=[(name, weight)])

    module.WorkerWrap.update_weight = update_weight


def keep_weights(module: Any) -> None:
    """Multiply with the weight as it is, instead of packing it into a copy."""

    def dispatch(layer: Any, remove_weight: bool) -> None:
        import torch

        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = dispatch


def attend_plainly(module: Any) -> None:
    """Packed samples ask for FlashAttention; torch's own attention finds the samples by their positions."""
    original = module.Actor.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "flash" in kwargs.get("attn_implementation", ""):
            kwargs["attn_implementation"] = "sdpa"
        original(self, *args, **kwargs)

    module.Actor.__init__ = __init__


@contextlib.contextmanager
def flash_attention_in_name() -> Iterator[None]:
    """Modules of that name while OpenRLHF imports them; transformers and vLLM must not see what is not there."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    for name in FLASH:
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    import einops

    padding: Any = sys.modules["flash_attn.bert_padding"]
    padding.index_first_axis, padding.unpad_input, padding.pad_input = index_first_axis, unpad_input, pad_input
    padding.rearrange = einops.rearrange
    sys.modules["flash_attn.utils.distributed"].all_gather = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in FLASH:
            sys.modules.pop(name, None)


def index_first_axis(values: Any, indices: Any) -> Any:
    """The rows `indices` of (N, ...)."""
    return values[indices]


def unpad_input(values: Any, mask: Any) -> tuple[Any, Any, Any, int, Any]:
    """The unmasked positions of (B, S, ...), their places, where each row begins, the longest row, and each row's length."""
    import torch

    lengths = mask.sum(1, dtype=torch.int32)
    places = mask.flatten().nonzero()[:, 0]
    begins = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return values.flatten(0, 1)[places], places, begins, int(lengths.max()), lengths


def pad_input(values: Any, places: Any, rows: int, width: int) -> Any:
    """The inverse: (B, S, ...) with zeros where nothing was."""
    whole = values.new_zeros((rows * width, *values.shape[1:])).index_copy(0, places, values)
    return whole.unflatten(0, (rows, width))


def around_import(name: str, surroundings: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Import a module inside of a context."""
    sys.meta_path.insert(0, _Surrounding(name, surroundings))


class _Surrounding:
    """Finds one module by the other finders, and executes it in the context."""

    def __init__(self, name: str, surroundings: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.name = name
        self.surroundings = surroundings

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        specification = importlib.util.find_spec(fullname)
        if specification is not None and specification.loader is not None:
            execute = specification.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with self.surroundings():
                    execute(module)

            specification.loader.exec_module = exec_module  # type: ignore[method-assign]
        return specification
