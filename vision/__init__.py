"""CLIP-T5 (Sec. 4): CLIP's towers, picture files, tasks, metrics and drawn scenes."""
