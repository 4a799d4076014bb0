"""What transformers' `generate` has to know about the model, and the modes that the model refuses."""

from torch import Tensor
from transformers.generation import GenerationMixin


class MoonwhaleGenerationMixin(GenerationMixin):
    """transformers' generation over every cache of it. Documents are read from the mask (B, cached + T) itself."""

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_) -> Tensor | None:
        """Leave the mask as it is where a static cache makes transformers expand it to every pair of tokens."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config) -> bool:
        """Return False: lengths are read from the cache, so a compiled forward pass would be compiled at each token."""
        if generation_config.compile_config is not None:
            raise ValueError("compile_config: a moonwhale model does not compile in generate(); leave it out")
        return False

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        if generation_config.use_mtp:
            raise ValueError(
                "use_mtp=True: transformers builds MTP modules from DeepSeek's layers only; draft with moonwhale's "
                "Engine, or export the model to DeepSeek-V3's format"
            )
        cache = generation_config.cache_implementation
        if cache and "offloaded" in cache and self.device.type != "cuda":
            raise ValueError(
                f"cache_implementation={cache!r}: it moves the cache out of a CUDA GPU's memory, and this model is on "
                f"{self.device}; leave it out"
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def init_continuous_batching(self, *_, **__):
        """Refuse what `generate_batch` and `cache_implementation="paged"` start with.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching: transformers' paged cache cannot hold latents; use moonwhale's Engine, which batches "
            "requests by itself, or generate()"
        )
