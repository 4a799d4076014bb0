"""What the model's tests share: a tiny model with every weight drawn, so that nothing hides behind a zero or a one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_attention_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**overrides)`: two layers, three heads, every width different."""
    from moonwhale.model import MoonwhaleConfig

    return lambda **overrides: MoonwhaleConfig(**{**TINY, **overrides})


@pytest.fixture(scope="session")
def draw():
    """`draw(model, seed)` draws every parameter and bias anew, at a scale that keeps activations near one."""
    import torch

    def draw(model, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in sorted(model.state_dict(keep_vars=True).items()):
                noise = torch.randn(p.shape, generator=generator)
                if p.ndim > 1:
                    p.copy_(noise * p.shape[-1] ** -0.5)
                else:
                    p.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
        return model

    return draw


@pytest.fixture(scope="session")
def tiny_model(tiny_config, draw):
    """`tiny_model(**overrides)`, drawn, in evaluation mode."""
    from moonwhale.model import MoonwhaleForCausalLM

    return lambda seed=0, **overrides: draw(MoonwhaleForCausalLM(tiny_config(**overrides)).eval(), seed)
