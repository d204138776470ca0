"""What an IP-Adapter file is and how it acts on a batch: files, projections, row embeddings and the attention patch."""

from .embeds import RowEmbeds as RowEmbeds
from .layer_weights import LayerWeights as LayerWeights
