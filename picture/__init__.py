"""The ground floor, which every room stands on: boxes, detections, the one rasteriser of masks, the one drawer."""
