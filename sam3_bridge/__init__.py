"""Detections and every way to get them: masks, boxes, SEGS and SAM3."""
