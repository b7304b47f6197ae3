"""GenEval: objects found by a detector, counted, coloured and placed as the prompt says."""
