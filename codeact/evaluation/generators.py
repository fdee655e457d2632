"""What generates: transformers, or vLLM. Adapters are safetensors and nothing else; no model's own code is run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from codeact.base.errors import InputError, MissingExtraError, import_extra, one_of
from codeact.evaluation.generate import (
    GENERATORS,
    Completion,
    Generator,
    HuggingFaceGenerator,
    Request,
    StopWatch,
)
from codeact.evaluation.settings import GenerationSettings


def load_generator(
    model: str, adapter: str | None = None, backend: str = "hf", dtype: str = "auto", device: str = "auto"
) -> Generator:
    """Load a model, with a LoRA adapter on it if there is one.

    Raises:
        InputError: model or adapter cannot be loaded.
        MissingExtraError: the backend, or peft for an adapter, is absent.
    """
    one_of("backend", backend, GENERATORS)
    folder = None if adapter is None else _adapter_folder(adapter)
    if backend == "vllm":
        return VllmGenerator(model, folder, dtype)
    from codeact.base.devices import resolve_device, resolve_dtype
    from codeact.models.loading import load_causal_lm, model_fingerprint

    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    loaded, tokenizer = load_causal_lm(model, where, precision)
    identity = _identity(model, folder, str(precision).removeprefix("torch."), model_fingerprint(model, loaded))
    if folder is not None:
        from codeact.models.adapters import apply_adapter

        loaded = apply_adapter(loaded, folder)
    return HuggingFaceGenerator(loaded, tokenizer, {**identity, "backend": "hf", "device": where.type})


def _identity(model: str, adapter: Path | None, dtype: str, fingerprint: str) -> dict[str, str]:
    from codeact.models.loading import folder_fingerprint

    return {
        "model": fingerprint if Path(model).expanduser().is_dir() else f"{model} {fingerprint}",
        "adapter": "" if adapter is None else folder_fingerprint(adapter),
        "dtype": dtype,
    }


def _adapter_folder(adapter: str) -> Path:
    """Where the adapter's files are: a folder, or a download of its JSON and safetensors files from the hub."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        if adapter.startswith(("/", "./", "../", "~")):
            raise InputError(f"no such adapter folder: {adapter}")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(adapter, allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"cannot load adapter {adapter!r}: {reason}; give a folder") from None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"adapter {adapter} has no {name}; save it with peft, as safetensors")
    return folder


def check_generator(name: str) -> None:
    """Refuse a backend whose library is not installed.

    Raises:
        MissingExtraError: vllm is not.
    """
    if name == "vllm" and not sys.modules.get(name) and (name in sys.modules or not importlib.util.find_spec(name)):
        raise MissingExtraError("vllm", "vllm", "--backend vllm")


class VllmGenerator:
    """vLLM, with the same prompts and the same stops. Not run on a device by its authors: tested with a stand-in."""

    apart = False

    def __init__(self, model: str, adapter: Path | None, dtype: str) -> None:
        vllm = import_extra("vllm", "vllm", "--backend vllm")
        name = str(Path(model).expanduser())
        self._vllm = vllm
        self._engine = vllm.LLM(
            model=name,
            dtype=dtype,
            trust_remote_code=False,
            load_format="safetensors",
            enable_lora=adapter is not None,
            # vLLM would else take top_k and the like from the model's generation_config.
            generation_config="vllm",
        )
        self._lora = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, str(adapter))
        self.tokenizer = self._engine.get_tokenizer()
        from codeact.models.loading import folder_fingerprint

        fingerprint = folder_fingerprint(Path(name)) if Path(name).is_dir() else "hub"
        self.identity = {**_identity(model, adapter, dtype, fingerprint), "backend": f"vllm {vllm.__version__}"}

    def batch_size(self, longest: int) -> int:
        """All at once: vLLM schedules by itself; this bounds only what a kill can lose."""
        return 256

    def complete(
        self, requests: Sequence[Request], ends: set[int], settings: GenerationSettings
    ) -> Iterator[tuple[Request, Completion]]:
        """See ``codeact.evaluation.generate.Generator``."""
        prompts = [{"prompt_token_ids": list(request.prompt.ids)} for request in requests]
        sampling = [
            self._vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=request.seed(settings.seed) if settings.temperature else None,
                max_tokens=settings.max_new_tokens,
                stop=list(request.prompt.stops),
                stop_token_ids=sorted(ends),
                detokenize=True,
            )
            for request in requests
        ]
        outputs = self._engine.generate(prompts, sampling, lora_request=self._lora, use_tqdm=False)
        for request, output in zip(requests, outputs, strict=True):
            # Ended and cut by the same code as with transformers.
            yield request, StopWatch(self.tokenizer, request.prompt, ends).completion(output.outputs[0].token_ids)
