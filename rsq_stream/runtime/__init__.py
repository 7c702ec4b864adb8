"""Threads, memory and copies of this machine."""
