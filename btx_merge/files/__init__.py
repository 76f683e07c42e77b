"""Small files from anywhere, read with limits, and the place of a result: a folder that appears in one step."""
