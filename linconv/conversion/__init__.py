"""Where attention sits in each transformers family, how it is swapped, saved and loaded."""

from linconv.conversion.convert import convert, encoder_layers, frame_lengths
from linconv.conversion.inspection import Inspection, inspect
from linconv.conversion.models import ConvertedModel

__all__ = ["ConvertedModel", "Inspection", "convert", "encoder_layers", "frame_lengths", "inspect"]
