"""Initialisation, precision and saving, which the body and the language model share."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_moonwhale import MoonwhaleConfig
from .convolution import EmbeddingConvolution
from .core import Attention
from .moe import DeepseekMoE, Experts, Router


class MoonwhalePreTrainedModel(PreTrainedModel):
    """Initialisation, saving and loading, shared by the body and the language model."""

    config: MoonwhaleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "MTPModule")
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)  # for loaders and quantizers; see step_statistics.py
    # DeepSeek's MTP modules carry copies of the main model's embedding and head.
    _keys_to_ignore_on_load_unexpected = (r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from a normal of `initializer_range`; those that write into the residual stream start at zero,
        unless `zero_init_residual` is false.

        So a new model passes its embeddings on unchanged, and the contribution of each block grows from nothing. After
        equal time this gave 1 % fewer bits per byte than normal weights there.
        """
        super()._init_weights(module)
        std, starts_at_zero = self.config.initializer_range, getattr(module, "starts_at_zero", False)
        if isinstance(module, nn.Linear | nn.Embedding) and starts_at_zero:  # set in mla.py, gqa.py and moe.py
            init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding) and self.config.embedding_initializer_range is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, EmbeddingConvolution):
            init.zeros_(module.weight)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            if starts_at_zero:
                init.zeros_(module.down_proj)
            else:
                init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepseekMoE):
            init.zeros_(module.load)
        elif isinstance(module, Attention):
            init.constant_(module.max_logit, -torch.inf)
            if getattr(module, "key_conv", None) is not None:
                init.zeros_(module.key_conv)

    def _resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the latent embeddings with the token embedding. New tokens add nothing to latents."""
        embedding = super()._resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if getattr(module, "latent_embedding", None) is not None:
                table, rows = module.latent_embedding, embedding.num_embeddings
                if table.num_embeddings != rows:  # else an optimizer may hold the parameter already
                    old = table.weight
                    new = old.new_zeros(rows, old.shape[1])
                    new[: len(old)] = old.detach()[:rows]
                    table.weight, table.num_embeddings = nn.Parameter(new, old.requires_grad), rows
        return embedding

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs) -> None:
        """Save as transformers does, but by default with experts as stacks: a resuming Trainer reads only these.

        `save_original_format=True` saves every expert by itself, which is DeepSeek's format.
        """
        if self.can_generate():
            # transformers reads sampling defaults without `do_sample`, as published, but saves them only if their hash
            # tells that nothing has changed. A Trainer changes the token ids, and not every loader sets the hash.
            self.generation_config._original_object_hash = hash(self.generation_config)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
