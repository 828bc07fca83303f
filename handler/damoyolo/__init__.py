"""DAMO-YOLO detection without a server: images in, detections out.

Legend of the shape letters used throughout: B images of a batch, A anchor points of all levels,
K classes, R largest distance bin (each side has R + 1 bins), N kept detections, H and W network input.
"""
