"""Measures what a trained model can do: bits per byte of text, answers to tasks, lm-eval's tasks, and MTP's drafts."""
