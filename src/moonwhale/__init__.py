"""moonwhale: MLA, MoBA, DeepSeekMoE, multi-token prediction and MuonClip in one small trainable language model."""

__version__ = "0.1.0"
