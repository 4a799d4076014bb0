"""Samples of what the model writes, or answers, while it trains."""

import time

import torch
from transformers import TrainerCallback

from moonwhale.data.chat import encode_conversation
from moonwhale.errors import UserError, printable
from moonwhale.train.callbacks import write_line

SAMPLE_TOKENS, TEMPERATURE = 48, 0.8


class SampleText(TrainerCallback):
    """Prints what the model writes after every `every`-th step. The main process does so.

    Training goes on as without it, bit for bit: the samples have random numbers of their own, the same ones each time.

    prompt: the text that the model continues. If it is empty, the model begins a document.
    """

    separator = ""  # printed between the prompt and what the model writes

    def __init__(self, trainer, every: int, prompt: str):
        self.trainer, self.every, self.prompt = trainer, every, prompt

    def on_step_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or state.global_step % self.every:
            return
        start = time.perf_counter()
        text = printable(self.prompt + self.separator + self.sample(), keep="")
        write_line(f"step {state.global_step:>6}  sample: {text}")
        self.trainer.speed.leave_out(time.perf_counter() - start)

    @torch.no_grad()
    def sample(self) -> str:
        """Returns up to SAMPLE_TOKENS tokens after the prompt, as text. They end with the document or the context."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        generator, training = torch.Generator().manual_seed(0), model.training
        ids = self.prompt_ids()[-model.config.max_position_embeddings + 1 :]
        n_prompt = len(ids)
        try:
            model.eval()
            with torch.compiler.set_stance("force_eager"):  # every length would be compiled
                while len(ids) < min(n_prompt + SAMPLE_TOKENS, model.config.max_position_embeddings):
                    out = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
                    chances = (out.logits[0, -1].float().cpu() / TEMPERATURE).softmax(-1)
                    ids.append(torch.multinomial(chances, 1, generator=generator).item())
                    if ids[-1] == tokenizer.eos_token_id:
                        break
        finally:
            model.train(training)
        return tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)

    def prompt_ids(self) -> list[int]:
        tokenizer = self.trainer.processing_class
        return tokenizer(self.prompt)["input_ids"] or [tokenizer.bos_token_id]


def message_ids(tokenizer, message: str) -> list[int]:
    """Returns the ids of a user's message, ready to be answered. Raises UserError if it is no text."""
    try:
        return encode_conversation(tokenizer, [{"role": "user", "content": message}])
    except UserError as error:
        raise UserError(f"`sample_prompt`: {error}") from error


class SampleAnswer(SampleText):
    """Prints how the model answers a message, `prompt`, after every `every`-th step."""

    separator = " → "

    def prompt_ids(self) -> list[int]:
        return message_ids(self.trainer.processing_class, self.prompt)
