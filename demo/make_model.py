"""Make the demo's checkpoint: a small GPT-2, pre-trained on the public family of the demo's corpus.

    python demo/make_model.py --output_dir demo/model

Two minutes on two CPU cores. The tokenizer, GPT-2's byte-level BPE with few tokens, is trained on the public family
as well: neither has seen a word of demo/comments.jsonl.
"""

import argparse
import tempfile

import datasets
from make_corpus import make_corpus
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

END_OF_TEXT = "<|endoftext|>"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output_dir", default="demo/model")
parser.add_argument("--max_steps", type=int, default=1_500)
options = parser.parse_args()

set_seed(1)
texts = [comment["content"] for comment in make_corpus("public", authors=20_000, seed=1)]
bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator(texts, vocab_size=768, special_tokens=[END_OF_TEXT])
with tempfile.TemporaryDirectory() as folder:
    bpe.save_model(folder)
    tokenizer = GPT2TokenizerFast.from_pretrained(folder, model_max_length=64)
tokenizer.pad_token = END_OF_TEXT

end = tokenizer.eos_token_id
config = GPT2Config(
    vocab_size=len(tokenizer),
    n_positions=64,
    n_embd=96,
    n_layer=3,
    n_head=4,
    bos_token_id=end,
    eos_token_id=end,
    pad_token_id=end,
)
model = GPT2LMHeadModel(config)
Trainer(
    model,
    TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.max_steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        logging_steps=100,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=datasets.Dataset.from_dict({"input_ids": tokenizer(texts, truncation=True, max_length=64)["input_ids"]}),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
).train()
tokenizer.backend_tokenizer.no_truncation()
model.save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)
