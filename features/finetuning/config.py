"""How an encoder is fine-tuned: objectives, augmentation, optimiser, and the loop around them."""

from typing import Literal, Self

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from features.images import ImageLimits
from features.tuning.modes import TuningConfig


class CoPurchaseConfig(BaseModel, frozen=True, extra="forbid"):
    """What is learnt from items that the same users interacted with in training."""

    of: Literal["each", "image", "text", "fused"] = Field(
        "each",
        description="Whose vectors two bought together should share: pictures', texts', both (each: the mean "
        "of the two losses), or the item's as a whole (fused: the encoder's own, else the mean of both unit "
        "vectors).",
    )
    temperature: PositiveFloat = Field(0.1, description="Of this contrast; it is not learnt.")
    damping: float = Field(
        0.5, ge=0, le=1, description="Pairs are drawn by common users / (popularity x popularity)^damping."
    )
    neighbours: PositiveInt = Field(50, description="Pairs kept for each item, the heaviest first.")
    pairs_share: float = Field(
        0.5, gt=0, le=1, description="Pairs of a step, as a share of batch_size; their items are encoded too."
    )


class ObjectivesConfig(BaseModel, frozen=True, extra="forbid"):
    """What is minimised: the weighted sum of these losses; a weight of 0 leaves a loss out."""

    image_text: NonNegativeFloat = Field(1.0, description="Weight of the contrast of pictures and texts.")
    contrast: Literal["auto", "softmax", "sigmoid"] = Field(
        "auto",
        description="softmax: symmetric InfoNCE (CLIP); sigmoid: each pair by itself (SigLIP); auto: what "
        "the encoder was trained with.",
    )
    equal_contents: Literal["positives", "negatives"] = Field(
        "positives", description="What another item with the very same picture or text is to an item."
    )
    matching: NonNegativeFloat = Field(
        0.0, description="Weight of image-text matching with hard negatives; VLMo only."
    )
    masked_language: NonNegativeFloat = Field(
        0.0,
        description="Weight of masked words beside the picture; VLMo only, whose pre-training takes 0.25.",
    )
    masked_share: float = Field(0.15, gt=0, lt=1, description="Share of the words that are masked.")
    co_purchase: NonNegativeFloat = Field(
        0.0, description="Weight of the contrast of items that the same users interacted with in training."
    )
    pairs: CoPurchaseConfig = Field(CoPurchaseConfig(), description="How `co_purchase` is learnt.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any((self.image_text, self.matching, self.masked_language, self.co_purchase)):
            raise ValueError("all weights of objectives are 0; give image_text or another one a weight")
        return self


class AugmentConfig(BaseModel, frozen=True, extra="forbid"):
    """What is done to a training picture before the encoder's own transform."""

    crop_least_area: float = Field(
        0.9, gt=0, le=1, description="Least share of a picture's area that a random crop keeps; 1: no crop."
    )
    crop_aspect: PositiveFloat = Field(
        4 / 3, ge=1, description="A crop is at most so many times as long as wide, relative to its picture."
    )
    flip: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pictures that are mirrored; 0, as covers and labels hold words.",
    )


class OptimizerConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW, and the rate over the steps."""

    learning_rate: PositiveFloat = Field(
        1e-5, description="At the end of the warm-up; a cosine takes it to 0."
    )
    head_factor: PositiveFloat = Field(
        1.0, description="The rate of heads and temperatures, in times learning_rate."
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="The rate of a block, in times that of the block above it."
    )
    weight_decay: NonNegativeFloat = Field(0.05, description="Of matrices; vectors and scalars have none.")
    beta2: float = Field(0.98, gt=0, lt=1, description="Decay of the squared gradients' mean.")
    warmup_share: float = Field(0.1, ge=0, le=1, description="Share of the steps in which the rate rises.")
    max_gradient_norm: NonNegativeFloat = Field(1.0, description="Longer gradients are cut to it; 0: never.")
    min_temperature: PositiveFloat = Field(0.01, description="A learnt temperature never falls below it.")


class FinetuningConfig(BaseModel, frozen=True, extra="forbid"):
    """All of it."""

    objectives: ObjectivesConfig = Field(default_factory=ObjectivesConfig)
    tuning: TuningConfig = Field(default_factory=TuningConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    epochs: PositiveInt = Field(10, description="Most passes over the training items.")
    batch_size: int = Field(256, ge=2, description="Items that are contrasted with each other.")
    chunk_size: PositiveInt = Field(
        32, description="Items encoded at a time; it sets the memory and does not change the gradient."
    )
    activations_mb: NonNegativeInt = Field(
        2_048,
        description="MiB of activations that may be kept; chunks that do not fit are run twice, as all are "
        "with tuning.gradient_checkpointing.",
    )
    accumulate: PositiveInt = Field(1, description="Batches whose gradients are averaged for one update.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="What is computed in, the weights staying float32; auto: bfloat16 on GPUs made for it.",
    )
    held_out_share: float = Field(
        0.1, gt=0, lt=1, description="Share of the items, by hash of their id, that only choose the epoch."
    )
    held_out_most: PositiveInt = Field(5_000, description="Items among which is searched when it is chosen.")
    patience: NonNegativeInt = Field(
        3, description="Stop after this many epochs in a row without a gain; 0 never stops early."
    )
    checkpoint_steps: NonNegativeInt = Field(
        0, description="Updates from one checkpoint to the next, beside that of each epoch; 0: none."
    )
    n_workers: NonNegativeInt = Field(0, description="Loaders of pictures; 0 chooses by cores and device.")
    limits: ImageLimits = Field(ImageLimits(), description="Larger pictures count as unreadable.")

    def identity(self) -> dict[str, JsonValue]:
        """The settings that can change a weight, be it by its last bit: what belongs into a key."""
        identity: dict[str, JsonValue] = self.model_dump(
            mode="json", exclude={"activations_mb", "checkpoint_steps", "n_workers"}
        )
        return identity
