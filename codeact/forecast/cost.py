"""What the stages will cost: floating-point operations, and bytes on a device. Arithmetic only, nothing is run."""

from __future__ import annotations

from dataclasses import dataclass

from codeact.ops.flops import ModelShape

GIB = 2.0**30
CUDA_CONTEXT = 1.5 * GIB
"""What a process takes on a GPU before its first tensor, with the workspaces of its libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the arithmetic needs to know of a causal model.

    ``trunk``, ``head`` and ``lookup`` count parameters: what every token is multiplied by, the LM head, and a table of
    input embeddings that is not also the head. ``layers``: (name, inputs, outputs) of every linear layer of the trunk.
    ``source`` says where this is known from.
    """

    shape: ModelShape
    trunk: int
    head: int
    lookup: int
    layers: tuple[tuple[str, int, int], ...]
    source: str

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.trunk + self.head + self.lookup

    def adapter_parameters(self, rank: int, targets: str) -> int:
        """Of LoRA adapters on the layers of these names: ``rank * (inputs + outputs)`` each."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self._adapted(targets))

    def adapted_inputs(self, targets: str) -> int:
        """Widths of the inputs of all layers with adapters, added up."""
        return sum(inputs for inputs, _ in self._adapted(targets))

    def _adapted(self, targets: str) -> list[tuple[int, int]]:
        names = {name.strip() for name in targets.split(",")}
        every = names == {"all-linear"}
        return [(i, o) for name, i, o in self.layers if every or name.rpartition(".")[2] in names]

    def cache_bytes(self, weight_bytes: float) -> float:
        """Keys and values of a token."""
        return 2 * self.shape.layers * self.shape.key_width * weight_bytes

    def forward_flops(self, tokens: float, squared_lengths: float, head_tokens: float) -> float:
        """Of a forward pass: 2 a parameter and token, the head's only for the tokens whose logits are wanted."""
        attention = self.shape.attention_flops(int(squared_lengths)) / 3  # that counts forward and backward
        return 2 * self.trunk * tokens + 2 * self.head * head_tokens + attention


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device, by what holds them."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them together."""
        return sum(self.parts.values())

    def largest(self) -> str:
        """What takes most."""
        return max(self.parts, key=lambda name: self.parts[name])


def inference_memory(model: ModelFacts, weight_bytes: float, tokens: int, base: float, cache_tokens: int = 0) -> Memory:
    """Estimate the peak of a forward pass over ``tokens``, with keys and values of ``cache_tokens`` kept."""
    a_layer = model.shape.activation_bytes(tokens, int(weight_bytes)) / model.shape.layers
    parts = {"the process": base, "weights": model.parameters * weight_bytes, "activations": a_layer}
    cache = {"keys and values": model.cache_bytes(weight_bytes) * cache_tokens} if cache_tokens else {}
    return Memory({**parts, **cache})


def decoding_seconds(
    model: ModelFacts, weight_bytes: float, steps: float, rows: int, length: float, flops: float, bandwidth: float
) -> float:
    """Time of ``steps`` tokens for each of ``rows`` answers at once: every step reads all weights and the cache.

    ``length``: tokens of a row on average while it grows; ``flops`` and ``bandwidth``: what the device reaches of each.
    """
    reading = (model.parameters * weight_bytes + model.cache_bytes(weight_bytes) * length * rows) / bandwidth
    computing = 2 * (model.trunk + model.head) * rows / flops
    return steps * max(reading, computing)
