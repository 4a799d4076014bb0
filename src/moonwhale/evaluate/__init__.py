"""What a trained model can do: bits per byte of text, answers to tasks, multiple choice by lm-eval, and what MTP drafts
gain.
"""
