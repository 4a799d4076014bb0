"""moonwhale: MLA, MoBA, DeepSeekMoE, multi-token prediction and MuonClip in one small trainable language model."""

import os

# Before any library reads it: TRL and others report their use otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
