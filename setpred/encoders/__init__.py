"""Image to latent vector."""

from setpred.encoders.resnet import ResNet
from setpred.encoders.small_cnn import SmallCNN

__all__ = ["ResNet", "SmallCNN"]
