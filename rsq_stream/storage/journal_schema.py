"""The tables of a journal, as SQLite makes them."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blocks (
    block INTEGER PRIMARY KEY, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS timings (
    block INTEGER, stage TEXT, seconds REAL NOT NULL, host_bytes INTEGER NOT NULL,
    device_bytes INTEGER NOT NULL, PRIMARY KEY (block, stage));
CREATE TABLE IF NOT EXISTS stages (
    block INTEGER, stage INTEGER, PRIMARY KEY (block, stage));
CREATE TABLE IF NOT EXISTS chunks (
    slot TEXT, unit INTEGER, checksum INTEGER NOT NULL, PRIMARY KEY (slot, unit));
CREATE TABLE IF NOT EXISTS linears (
    block INTEGER, name TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tensors (name TEXT PRIMARY KEY, checksum INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS shards (
    name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS source_files (
    name TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS source_tensors (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS digest (id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL);
"""
TABLES = (
    "run",
    "blocks",
    "timings",
    "stages",
    "chunks",
    "linears",
    "tensors",
    "shards",
    "source_files",
    "source_tensors",
)
"""What the digest covers: SQLite itself would not notice a flipped bit in a value."""
