"""python examples/speech.py: Whisper inside a LightningModule of your own learns another instrument.

Sounds are melodies of four tones, the text is the tones' numbers. A small Whisper has learned to write down what a
flute plays, which is sines. A saw, with all its overtones, sounds different: a LoRA on all linear layers learns it, and
without the adapter the base is what it was.
"""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import lightning_peft as lp

START, END, FIRST_TONE, TONES = 0, 1, 2, 6  # numbers of tokens
RATE, SECONDS = 4000, 1  # of samples, of a melody
FEATURES = WhisperFeatureExtractor(feature_size=32, sampling_rate=RATE, hop_length=100, n_fft=512, chunk_length=SECONDS)


class Transcriber(L.LightningModule):
    """A Whisper that writes down melodies; with a pretrained one, `from_pretrained` takes the place of the config."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        config = WhisperConfig(
            vocab_size=FIRST_TONE + TONES, num_mel_bins=32, d_model=48, max_source_positions=RATE // 200,
            max_target_positions=8, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, bos_token_id=START, pad_token_id=START,
            eos_token_id=END, decoder_start_token_id=START, begin_suppress_tokens=[],
        )  # fmt: skip
        self.whisper = WhisperForConditionalGeneration(config)
        self.whisper.generation_config.max_length = 6  # the start, four tones, the end

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        features, tokens = batch
        return self.whisper(input_features=features, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    @torch.no_grad()
    def accuracy(self, data: TensorDataset) -> float:
        """The share of tones that the model writes down right."""
        features, tokens = data.tensors
        written = self.eval().whisper.generate(features)
        return (written[:, -4:] == tokens[:, :4]).float().mean().item()


def melodies(instrument: str, count: int, seed: int) -> TensorDataset:
    """Play random melodies, and return (mel spectrograms, tokens)."""
    torch.manual_seed(seed)
    tones = torch.randint(TONES, (count, 4))
    pitches = 400 * 2 ** (tones / 4 + 0.02 * torch.randn(tones.shape))  # in Hertz, not perfectly in tune
    phase = (pitches.repeat_interleave(RATE // 4, dim=1) / RATE).cumsum(1)
    sound = torch.sin(6.2832 * phase) if instrument == "flute" else 2 * (phase % 1) - 1
    sound = sound + 0.05 * torch.randn(sound.shape)
    features = FEATURES(list(sound.numpy()), sampling_rate=RATE, return_tensors="pt").input_features
    return TensorDataset(features, torch.cat([FIRST_TONE + tones, torch.full((count, 1), END)], dim=1))


def fit(module: Transcriber, data: TensorDataset, epochs: int, callbacks: list[L.Callback]) -> None:
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, gradient_clip_val=1.0, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module.train(), DataLoader(data, 16, shuffle=True))


if __name__ == "__main__":
    flute, saw = melodies("flute", 128, seed=1), melodies("saw", 128, seed=2)  # to test on
    torch.manual_seed(0)
    module = Transcriber(learning_rate=1e-3)
    fit(module, melodies("flute", 768, seed=3), epochs=4, callbacks=[])  # stands for pretraining
    before = {"flute": module.accuracy(flute), "saw": module.accuracy(saw)}

    module.learning_rate = 5e-3
    strategy = lp.PEFTStrategy(lp.LoRA(rank=8, alpha=16, targets=["all-linear"]))
    fit(module, melodies("saw", 256, seed=4), epochs=4, callbacks=[strategy])
    after = {"saw": module.accuracy(saw)}
    with lp.disabled(module):
        after["flute"] = module.accuracy(flute)

    print(f"before: flute {before['flute']:.1%}, saw {before['saw']:.1%}")
    print(f"after:  flute {after['flute']:.1%} with the adapter switched off, saw {after['saw']:.1%} with it")
