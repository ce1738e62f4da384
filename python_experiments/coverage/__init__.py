"""Which networks the engine is exact on, measured: a catalogue of cases, this engine and its peers side by side."""
