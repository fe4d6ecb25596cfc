"""Disk, network, machine: what the method needs around it. Nothing here knows a question, a model or a task."""
