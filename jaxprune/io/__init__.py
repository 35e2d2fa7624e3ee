"""What lies on disk: checkpoints between rounds, pruned models, exports."""

from jaxprune.io import checkpoints as checkpoints
from jaxprune.io import export as export
from jaxprune.io._converters import save_onnx as save_onnx
from jaxprune.io._converters import save_tflite as save_tflite
from jaxprune.io._files import write_atomically as write_atomically
from jaxprune.io._pruned import Loaded as Loaded
from jaxprune.io._pruned import load_pruned as load_pruned
from jaxprune.io._pruned import save_pruned as save_pruned
from jaxprune.io._safetensors import Weights as Weights
from jaxprune.io._safetensors import load_safetensors as load_safetensors
from jaxprune.io._safetensors import save_safetensors as save_safetensors
from jaxprune.io._widths import ExportedWidths as ExportedWidths
from jaxprune.io._widths import load_widths as load_widths
from jaxprune.io._widths import save_widths as save_widths
from jaxprune.io.export import Exported as Exported
from jaxprune.io.export import load_exported as load_exported
from jaxprune.io.export import save_exported as save_exported
