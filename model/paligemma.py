"""PaliGemma (arXiv 2407.07726): vision tower, connector and decoder joined by a prefix-LM.

A row reads `<image> x N, bos, prefix, "\\n", suffix, eos`. Image and prefix see each other in both directions; the
suffix is causal and sees all of the prefix. Which is which is data (`token_type_ids`), the same in training,
evaluation and generation. As the prefix never sees a suffix, a row may hold several, each computed as in a row of its
own. Only supervised positions reach the output head: a handful of rows against a 257k vocabulary instead of hundreds.

Axes: B batch, S sequence, I images (one per row), N image tokens, D hidden, V vocabulary, U query positions of
the last layer, L supervised tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import checkpoint
from model.batch import TokenBatch, image_positions
from model.config import PaliGemmaConfig
from model.connectors import make_connector
from model.gemma import GemmaForCausalLM
from model.generate import Generation, Sampling, generate, require_one_suffix, require_right_padding
from model.hub import fetch
from model.layers import prefix_lm_mask
from model.progress import Progress, silent
from model.score import Candidates, Scores, score
from model.siglip import SiglipVisionTower


@dataclasses.dataclass(frozen=True)
class PaliGemmaOutput:
    """Without labels logits [B, S, V]; with labels logits [L, V], row by row those that predict a supervised token, and
    loss.
    """

    logits: Tensor
    loss: Tensor | None = None


class PaliGemma(nn.Module):
    """The network; parameter names are those of the published checkpoint.

    `source` is the directory it was loaded from: `save_pretrained` takes tokenizer and processor files from there.
    `opened_config` is what it was before `convert` (model/convert.py) changed it, and `replaced` the values of the
    parameters that are no longer in it since, by name, in host memory.
    """

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = self.opened_config = config
        self.source: Path | None = None
        self.replaced: dict[str, Tensor] = {}
        self.vision_tower = SiglipVisionTower(config.vision)
        self.multi_modal_projector = make_connector(config)
        self.language_model = GemmaForCausalLM(config.text)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        progress: Progress = silent,
    ) -> PaliGemma:
        """Open a published checkpoint: a directory or a Hub id; safetensors, single or sharded, any known key layout.

        Weights are cast to `dtype` on the way. Memory above what was there before stays within a tenth of the weights.

        Raises:
            ValueError: nothing to open, another architecture, or tensors missing, unexpected or mis-shaped.
        """
        directory = fetch(path_or_hub_id, revision)
        model = cls.empty(PaliGemmaConfig.from_directory(directory), dtype, "meta")
        checkpoint.load_weights(model, directory, device, progress)
        model.source = directory
        return model.eval()

    @classmethod
    def empty(cls, config: PaliGemmaConfig, dtype: torch.dtype, device: str | torch.device) -> PaliGemma:
        """A network with memory for its weights, and no values in it."""
        with torch.device("meta"):
            model = cls(config)
        return model.to(dtype).to_empty(device=device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, weights, tokenizer and processor files in the hub layout, to be opened by `transformers` too.

        Raises:
            ValueError: the parameters are not a plain PaliGemma's (adapters are still in place).
        """
        with torch.device("meta"):
            expected = PaliGemma(self.config).state_dict()
        checkpoint.save(Path(directory), self.state_dict(), expected, self.config.to_hf(self.dtype), self.source)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> image tokens [I, N, D], to be passed on as `image_features`.

        pixel_values: float [I, 3, H, W]; of a network with tiles [I, T + 1, 3, H, W], the whole image last.

        Raises:
            ValueError: pixels of another shape.
        """
        return self.connect(self.vision_features(pixel_values))

    def vision_features(self, pixel_values: Tensor) -> list[Tensor]:
        """Pixels as in `encode_images` -> what the connector takes: the vision tower's features, and the mean of each
        group of hidden states that it asks for; each [I, T, P, D] of T tiles (1 without) and P patches.
        """
        views = self.config.views
        if pixel_values.shape[1:-3] != ((views,) if views > 1 else ()):
            expected = f"[images, {views}, 3, height, width]" if views > 1 else "[images, 3, height, width]"
            raise ValueError(
                f"pixel_values are {list(pixel_values.shape)}, this network takes {expected}: use its own processor"
            )
        features, means = self.vision_tower(pixel_values.flatten(0, -4), self.multi_modal_projector.groups)
        return [states.unflatten(0, (-1, views)) for states in (features, *means)]

    def connect(self, features: Sequence[Tensor]) -> Tensor:
        """What `vision_features` gives -> image tokens [I, N, D]."""
        tokens: Tensor = self.multi_modal_projector(*(states.flatten(0, 1) for states in features))
        return tokens.unflatten(0, (-1, self.config.views)).flatten(1, 2)

    def embed(self, input_ids: Tensor, image_features: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Token ids i64 [B, S] and image tokens [B, N, D] -> input embeddings [B, S, D].

        positions: i64 [B, N], where the image tokens stand; without them they are looked for.
        """
        if positions is None:
            positions = image_positions(input_ids.cpu(), self.config.image_token_id).to(input_ids.device)
        rows, expected = positions.shape
        given = (0, 0) if image_features is None else image_features.shape[:2]
        if given != ((rows, expected) if expected else (0, 0)):
            images = "no image" if image_features is None else f"{given[0]} images of {given[1]} tokens"
            raise ValueError(
                f"the {rows} rows hold {[expected] * rows} image tokens, given: {images}; expected one image a row, "
                f"each {self.config.num_image_tokens} <image> tokens for this checkpoint"
            )
        embedded = self.language_model.model.embed(input_ids)
        if image_features is None:
            return embedded
        index = positions[..., None].expand_as(image_features)
        return embedded.scatter(1, index, image_features.to(embedded.dtype))

    def hidden_states(
        self,
        input_ids: Tensor,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, S, D], before the output head; arguments as in `forward`."""
        batch = TokenBatch.of(self.config.image_token_id, input_ids, attention_mask, token_type_ids)
        return self.decode(batch.to(input_ids.device), image_features)

    def decode(self, batch: TokenBatch, image_features: Tensor | None) -> Tensor:
        """Final hidden states of a checked batch: [B, S, D], or where it has labels those of its query positions,
        [B, U, D]: the last layer then computes those alone.
        """
        x = self.embed(batch.input_ids, image_features, batch.image_positions)  # (B, S, D)
        mask = prefix_lm_mask(batch.attention_mask, batch.token_type_ids)
        hidden: Tensor = self.language_model.model(x, mask, batch.position_ids, query_positions=batch.query_positions)
        return hidden

    def supervised_logits(self, batch: TokenBatch, image_features: Tensor | None) -> Tensor:
        """Logits [L, V] that predict the targets of a checked batch with labels. The position that predicts the first
        tokens of several suffixes passes the head for each of them.
        """
        assert batch.predicting is not None, "the batch has labels"
        hidden = self.decode(batch, image_features).flatten(0, 1)  # (B * U, D)
        # Not index_select: on a card its backward adds the gradients of a position that is taken several times in any
        # order (torch.use_deterministic_algorithms lists it, and not an embedding's).
        logits: Tensor = self.language_model.head(F.embedding(batch.predicting, hidden))
        return logits

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        num_items_in_batch: float | None = None,
        batch: TokenBatch | None = None,
        loss_weights: Tensor | None = None,
    ) -> PaliGemmaOutput:
        """Logits, and with labels the cross-entropy of the supervised tokens.

        Args:
            input_ids: i64 [B, S], right-padded.
            pixel_values: float [B, 3, H, W], with tiles [B, T + 1, 3, H, W]; or `image_features` [B, N, D] from
                `encode_images`; or neither.
            attention_mask: [B, S], 1 at real tokens; default all.
            token_type_ids: [B, S], 0 image and prefix, 1 suffix; with several suffixes, none of which sees another, 2
                the second and so on. Default all prefix. Required with labels, because without it the prefix would see
                the answer.
            labels: i64 [B, S], the token itself at supervised positions, -100 elsewhere.
            num_items_in_batch: divide the summed loss by this number instead of by the supervised tokens of this call:
                the supervised tokens of a whole optimizer step, when this call is one micro-batch of it. With weights,
                their sum over those tokens.
            batch: `TokenBatch.of` ids, mask, types, labels and weights, on this device; given instead of them.
                Nothing in the pass then depends on values that only the device knows, so that the host need not wait.
            loss_weights: f32 [B, S], how often the loss of each supervised token counts; default once.

        Raises:
            ValueError: image tokens and images that do not match, left padding, types that are not those of a prefix
                and its suffixes, labels without types or all ignored, weights that are not above 0.
        """
        if (input_ids is None) == (batch is None):
            raise ValueError("expected input_ids, or a batch made of them, and not both")
        if batch is None:
            assert input_ids is not None
            given = (input_ids, attention_mask, token_type_ids, labels, loss_weights)
            batch = TokenBatch.of(self.config.image_token_id, *given).to(input_ids.device)
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("pixel_values and image_features were both given: pass one of them")
            image_features = self.encode_images(pixel_values)
        if batch.targets is None:
            return PaliGemmaOutput(self.language_model.head(self.decode(batch, image_features)))
        logits = self.supervised_logits(batch, image_features)  # (L, V)
        if batch.weights is None:
            total = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
            return PaliGemmaOutput(logits, total / (num_items_in_batch or len(logits)))
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")  # (L,)
        return PaliGemmaOutput(logits, (losses * batch.weights).sum() / (num_items_in_batch or batch.weights.sum()))

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, **settings: Any) -> Tensor:
        """Continue right-padded prompts: the new tokens of `generate_scored`, which takes the same arguments.

        Returns:
            i64 [B * samples, T], the new tokens only: each row ends in `eos` (unless cut off) and is filled up with
            `pad`.

        Raises:
            ValueError: settings that cannot be, prompts not padded on the right, images that do not match.
        """
        return self.generate_scored(input_ids, pixel_values, **settings).tokens

    @torch.inference_mode()
    def generate_scored(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        samples: int = 1,
        seeds: Sequence[int] = (),
        is_done: Callable[[bool], bool] = bool,
    ) -> Generation:
        """Continue right-padded prompts; images, masks and types as in `forward`, the rest as in `Sampling`.

        Args:
            is_done: asked after each token, with whether every row has finished, whether decoding stops: processes that
                share sharded layers go on until every row of all of them has.

        Returns:
            The new tokens only, each row filled up with `pad` behind its `eos`, and their log-probabilities; of
            several samples the rows of a prompt are side by side.

        Raises:
            ValueError: settings that cannot be, prompts not padded on the right or with several suffixes, images that
                do not match.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, samples, seeds)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        require_right_padding(attention_mask)
        require_one_suffix(token_type_ids, attention_mask)
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        x = self.embed(input_ids, image_features)  # (B, S, D)
        eos, pad = self.config.eos_token_id, self.config.pad_token_id
        return generate(self.language_model, x, attention_mask, token_type_ids, sampling, eos, pad, is_done)

    @torch.inference_mode()
    def score(
        self,
        input_ids: Tensor,
        candidates: Sequence[Candidates],
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        at_once: int = 16,
    ) -> Scores:
        """How likely each candidate is behind its prompt: equal to scoring each in a row of its own.

        Args:
            input_ids: i64 [B, S], right-padded prompts; images and mask as in `forward`.
            candidates: of each prompt at least one, as tokens: `<eos>` included, where an answer should end there.
            at_once: candidates of a prompt in one row; memory, not the result, depends on it.

        Raises:
            ValueError: not as many prompts as lists of candidates, an empty one among those or their tokens, prompts
                not padded on the right, images that do not match.
        """
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)

        def logits_of(batch: TokenBatch, features: Tensor | None) -> Tensor:
            return self.supervised_logits(batch.to(self.device), features)

        image, pad = self.config.image_token_id, self.config.pad_token_id
        return score(logits_of, input_ids, attention_mask, candidates, image_features, at_once, image, pad)
