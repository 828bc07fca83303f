"""The network: TinyNAS backbone, RepGFPN neck and ZeroHead of DAMO-YOLO (arXiv 2211.15444)."""
