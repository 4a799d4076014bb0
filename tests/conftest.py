"""Shared fixtures. Tiny models have random values in every parameter, so that no zero or one hides an error."""

import os
import random
import shutil
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from toy import TOY

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


@pytest.fixture(autouse=True)
def plain_training():
    """After each test the model and MuonClip compute in PyTorch again, whatever a run in this process has set."""
    yield
    for name in ("moonwhale.model.kernels", "moonwhale.optim.elementwise"):
        if module := sys.modules.get(name):
            module.compiled = None


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**overrides)` returns a configuration with two layers, three heads, and all widths different."""
    from moonwhale.model import MoonwhaleConfig

    return lambda **overrides: MoonwhaleConfig(**{**TINY, **overrides})


@pytest.fixture(scope="session")
def draw():
    """`draw(model, seed)` sets every parameter and bias to random values that keep activations near one."""
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
    """`tiny_model(seed, **overrides)` returns a model with random weights in evaluation mode."""
    from moonwhale.model import MoonwhaleForCausalLM

    return lambda seed=0, **overrides: draw(MoonwhaleForCausalLM(tiny_config(**overrides)).eval(), seed)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder of forty short documents from a small vocabulary: about 40 rows of 32 tokens to train on."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["the", "a", "whale", "moon", "sea", "sings", "swims", "rises", "deep", "over", "under", "of"]
    for i in range(40):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(5, 60)))
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture
def tiny_run(text_folder, tmp_path, tmp_path_factory, monkeypatch):
    """`tiny_run(**options)` returns the options of a one-second run: all mechanisms, two micro-batches a step."""
    from moonwhale.presets import PAPER
    from moonwhale.train.config import TrainConfig

    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    # Two MTP modules, which are trained from the first step, and MoBA in every block
    model = TOY | PAPER.model | {"moba_full_attention_layers": None, "num_nextn_predict_layers": 2}
    options = {
        "out": str(tmp_path / "run"),
        "data": str(text_folder),
        "context": 32,
        "batch_size": 2,
        "tokens_per_step": 128,
        "steps": 6,
        "lr": 5e-3,
        "warmup_steps": 1,
        "eval_every": 0,
        "eval_rows": 4,
        "save_every": 0,
        "log_every": 1,
        "report_to": ["none"],
        "device": "cpu",
        "precision": "fp32",
        **PAPER.train,
    }

    def tiny_run(**changes):
        own = {} if changes.get("from_") else model  # else it has the model of a checkpoint
        return TrainConfig.resolve({**options, "model": own | changes.pop("model", {}), **changes})

    return tiny_run


@pytest.fixture(scope="session")
def small_tokenizer():
    from moonwhale.data.tokenizer import train_tokenizer

    return train_tokenizer(["The whale sang to the moon, and the moon sang back.", "Ünïcode!"] * 4, 310)


@pytest.fixture(scope="session")
def small_model(small_tokenizer, draw):
    """A model whose random weights are large enough for peaked predictions; every second block uses MoBA."""
    from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM

    config = MoonwhaleConfig(
        vocab_size=len(small_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        moba_block_size=4,
        moba_topk=2,
        moba_full_attention_layers=[1],
        moba_key_conv=3,
        embedding_conv=2,
        latent_embedding_every=2,
        n_routed_experts=4,
        moe_intermediate_size=16,
        num_nextn_predict_layers=1,
        max_position_embeddings=96,
        bos_token_id=small_tokenizer.bos_token_id,
        eos_token_id=small_tokenizer.eos_token_id,
        pad_token_id=small_tokenizer.pad_token_id,
    )
    return draw(MoonwhaleForCausalLM(config).eval(), seed=1)


@pytest.fixture(scope="session")
def small_engine(small_model, small_tokenizer):
    """`small_engine(**options)` returns a new engine with the small model."""
    from moonwhale.infer.engine import Engine

    return lambda **options: Engine(small_model, small_tokenizer, **options)


@pytest.fixture(scope="session")
def small_checkpoint(small_model, small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_model.save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def drawn_checkpoint(tiny_config, draw, tmp_path, capsys):
    """`drawn_checkpoint(tokenizer, **overrides)` returns the folder of a randomly initialized model, and the model."""
    from moonwhale.model import MoonwhaleForCausalLM

    def drawn_checkpoint(tokenizer, **overrides):
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = tiny_config(**{"vocab_size": len(tokenizer), **ids, **overrides})
        model = draw(MoonwhaleForCausalLM(config).eval())
        model.save_pretrained(tmp_path / "ours")
        tokenizer.save_pretrained(tmp_path / "ours")
        capsys.readouterr()  # discard what transformers prints while saving
        return tmp_path / "ours", model

    return drawn_checkpoint


@pytest.fixture(scope="session")
def trained_checkpoint(text_folder, tmp_path_factory):
    """The folder that `moonwhale train` writes for a model with every mechanism, after two steps."""
    from moonwhale.cli import main

    folder = tmp_path_factory.mktemp("trained")
    model = [f"--model.{name}={'0,1' if name.startswith('moba_full') else value}" for name, value in TOY.items()]
    options = (
        "--context 32 --batch-size 2 --tokens-per-step 128 --steps 2 --warmup-steps 1 --eval-every 0 --eval-rows 4"
    )
    fixed = "--save-every 0 --report-to none --device cpu --precision fp32"
    fixed += " --model.embedding_conv 0 --model.latent_embedding_every 0"  # fits all exports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        arguments = ["--data", str(text_folder), "--out", str(folder / "run"), *options.split(), *fixed.split(), *model]
        assert main(["train", *arguments]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, Google's Chrome, or the one that `playwright install chromium` has brought."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        names = ("chromium", "chromium-browser", "google-chrome", running.chromium.executable_path)
        path = next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium is installed (apt-get install chromium)")
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
