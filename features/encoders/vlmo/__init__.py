"""VLMo (Bao et al., 2022): one network for pictures, texts and both together."""

from features.encoders.vlmo.encoder import VlmoEncoder, describe_vlmo, load_vlmo_encoder

__all__ = ["VlmoEncoder", "describe_vlmo", "load_vlmo_encoder"]
