"""The public API as a user's typed code calls it. `make test` runs mypy on this file; it is never executed."""

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor

from moonwhale.data.loading import load_source
from moonwhale.evaluate.config import EvalConfig
from moonwhale.evaluate.evaluation import evaluate
from moonwhale.infer.engine import Engine
from moonwhale.model import (
    DeepseekMoE,
    Documents,
    GroupedQueryAttention,
    MoonwhaleConfig,
    MoonwhaleForCausalLM,
    MultiheadLatentAttention,
    moba_attention,
)
from moonwhale.optim import MuonClip, StepHooks, attach_hooks, param_groups
from moonwhale.train.config import TrainConfig
from moonwhale.train.pretrain import train
from moonwhale.train.run_result import RunResult

config = MoonwhaleConfig(vocab_size=512, attention="mla", moba_full_attention_layers=[1])
assert_type(config.moba_topk, int)
assert_type(config.q_lora_rank, int | None)
assert_type(config.kv_cache_numbers_per_token, int)

x = torch.randn(2, 64, config.hidden_size)
documents = Documents.from_inputs(2, 64, x.device, attention_mask=torch.ones(2, 64))
assert_type(documents, Documents)

attention = MultiheadLatentAttention(config)
assert_type(attention.forward(x, documents=documents), tuple[Tensor | None, ...])
assert_type(attention.clip_qk_(100.0), Tensor)
assert_type(attention.max_logit, Tensor)
twin = GroupedQueryAttention(config, layer_idx=1)
assert_type(twin.forward(x), tuple[Tensor | None, ...])
assert_type(twin.max_logit, Tensor)

moe = DeepseekMoE(config)
assert_type(moe.forward(x, collect_statistics=True), tuple[Tensor, Tensor, Tensor])
assert_type(moe.load, Tensor)
moe.update_bias_()

q = torch.randn(2, 4, 64, 16)
assert_type(moba_attention(q, q, q, 0.25, documents, block_size=16, topk=2), tuple[Tensor, Tensor])

model = MoonwhaleForCausalLM(config)
optimizer = MuonClip(param_groups(model, lr=3e-4, weight_decay=0.1), momentum=0.95)
hooks = attach_hooks(optimizer, model, qk_clip_tau=100.0)
assert_type(hooks, StepHooks)
assert_type(hooks.last, dict[str, Tensor])
hooks.reset()
hooks.remove()

run = train(TrainConfig(steps=10, data="chitchat", out="runs/typed"))
assert_type(run, RunResult)
assert_type(run.best, Path | None)
assert_type(run.model, MoonwhaleForCausalLM)
engine = Engine(run.model, run.tokenizer, draft=1)
assert_type(engine.generate(["The whale"], max_new_tokens=8)[0].text, str)
assert_type(evaluate("runs/typed", EvalConfig(data="chitchat")), dict[str, dict[str, Any]])
assert_type(load_source("chitchat", limit=3).name, str)

attention.forward("x")  # type: ignore[arg-type]
MoonwhaleConfig(moba_top_k=1)  # type: ignore[call-arg]
moba_attention(q, q, q, 0.25, documents, 16, "2")  # type: ignore[arg-type]
MuonClip(param_groups(model), learning_rate=1)  # type: ignore[call-arg]
attach_hooks(optimizer, model, "off")  # type: ignore[arg-type]
evaluate(1, EvalConfig())  # type: ignore[arg-type]
