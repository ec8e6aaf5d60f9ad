"""Where each transformers family has its attention, and how it is replaced, saved and loaded."""

from linconv.conversion.convert import convert, encoder_layers, frame_lengths
from linconv.conversion.inspection import Inspection, inspect
from linconv.conversion.models import ConvertedModel

__all__ = ["ConvertedModel", "Inspection", "convert", "encoder_layers", "frame_lengths", "inspect"]
