"""Breaks the real scripts on purpose (kills, full disks, damaged files) and compares what is left, byte for byte.

python -m faults
"""
