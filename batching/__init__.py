"""From regions of a picture to one sampled batch and back: plan, crops, noise, conditioning, sampling, paste."""
