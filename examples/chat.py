"""python examples/chat.py: chats become an adapter, by the chat template of the tokenizer; then it answers.

A small assistant of a town hall knows when everything opens. In winter that changes: a LoRA learns the new hours from
chats, the base keeps the old ones. With a real model, its folder or hub name takes the place of `small_assistant`, and
`lightning-peft fit --config configs/chat.yaml` does the same without any Python.
"""

import json
from pathlib import Path

import lightning as L
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import lightning_peft as lp
from lightning_peft.tasks import CausalLM, ChatDataModule

FOLDER = Path("runs/chat")
BASE = FOLDER / "base"
PLACES = ["library", "museum", "swimming pool", "registry", "market", "youth club", "theatre", "harbour office"]
QUESTIONS = ["When does the {} open ?", "Hello , what are the hours of the {} ?", "Is the {} open this morning ?"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def chats(file: str, season: str) -> str:
    """Write chats as most tools do, a line of JSON for each."""
    with (FOLDER / file).open("w", encoding="utf-8") as lines:
        for question in QUESTIONS:
            for number, place in enumerate(PLACES):
                answer = f"The {place} opens at {7 + number % 4 + (season == 'winter')} ."
                turns = [("user", question.format(place)), ("assistant", answer)]
                lines.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return str(FOLDER / file)


def fit(model: CausalLM, file: str, method: lp.Method, epochs: int) -> None:
    data = ChatDataModule(train=file, tokenizer=str(BASE), batch_size=8, validation_fraction=0, show_row=True)
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[lp.PEFTStrategy(method)], logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, data)


def small_assistant() -> None:
    """Make a tokenizer of whole words with a chat template and a Llama that knows the summer's hours."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
    texts = [*QUESTIONS, *PLACES, "user assistant The opens at .", " ".join(map(str, range(7, 12)))]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=known))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.save_pretrained(BASE)
    settings = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    assistant = CausalLM(config=settings, tokenizer=str(BASE), learning_rate=5e-3)
    fit(assistant, chats("summer.jsonl", "summer"), lp.FullFineTuning(), epochs=30)
    assistant.network.save_pretrained(BASE)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    L.seed_everything(1)
    small_assistant()

    model = CausalLM(model=str(BASE), learning_rate=1e-2, max_new_tokens=8)
    fit(model, chats("winter.jsonl", "winter"), lp.LoRA(rank=8, alpha=16, targets=["all-linear"]), epochs=10)
    lp.save_adapter(model, FOLDER / "adapter")  # with the tokenizer and its template

    served = lp.load_adapter(CausalLM(model=str(BASE)), FOLDER / "adapter")
    right = 0
    for number, place in enumerate(PLACES):
        question = [{"role": "user", "content": f"When does the {place} open ?"}]
        with lp.disabled(served):
            summer = served.chat(question)
        winter = served.chat(question)
        right += (str(7 + number % 4) in summer.split()) and (str(8 + number % 4) in winter.split())
        print(f"When does the {place} open? {summer} With the adapter: {winter}")
    print(f"{right} of {len(PLACES)} right, with and without the adapter")
