"""A model of lm-eval whose log-likelihoods are ours: packs without padding or logits, the same bits at any batch size.

python -m codeact.integrations.lm_eval run --model codeact --model_args pretrained=MODEL --tasks hellaswag

lm-eval (0.4.13) looks for models in its own package only. So this module is its command line with one model more.
"""

from __future__ import annotations

from typing import Any

from codeact.base.errors import InputError, MissingExtraError
from codeact.scoring.loglikelihood import LikelihoodScorer

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError:
    raise MissingExtraError("lm_eval", "lm-eval", "codeact.integrations.lm_eval") from None


@register_model("codeact")
class PackedLM(HFLM):  # type: ignore[misc]
    """lm-eval's own ``hf``, with its arguments, tokens and generation; weights are safetensors only."""

    def __init__(self, pretrained: Any, tokens_per_pack: int | None = None, **more: Any) -> None:
        super().__init__(pretrained, **{"use_safetensors": True, **more} if isinstance(pretrained, str) else more)
        if self.backend != "causal":
            raise InputError("model codeact scores causal models; use --model hf for this one")
        self._packs = LikelihoodScorer(self.model, self.tokenizer, self.max_length, tokens_per_pack=tokens_per_pack)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """lm-eval's: all requests at once, whatever the batch size."""
        results = [result[:2] for result in self._packs.score([(before, after) for _, before, after in requests])]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:  # of a window of a text
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
