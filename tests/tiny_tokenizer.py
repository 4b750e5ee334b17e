"""A small byte-level BPE tokenizer with a chat template, as a model directory; made without a network."""

from pathlib import Path

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "GhostServe keeps the stream going when a device dies",
    "the end of the story is not the end of the stream",
    "日本語のテキスト と émojis 🙂🙃 naïve café",
] * 8
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the first message must not be the assistant\\'s') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer_dir(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, add_bos: bool = False) -> Path:
    """Train and save the tokenizer. `add_bos`: a post-processor puts <|endoftext|> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(LINES, trainer)
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", core.token_to_id("<|endoftext|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>" if add_bos else None,
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[:2],
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder
