"""The embedded demo model: its checkpoint and the command `saccade demo`.

`training/`, which is not in the wheel, has its data, training and evaluation.
"""
