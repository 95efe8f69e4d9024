"""Everything between a set of objects and token ids: coordinate vocabulary, prompts, codecs, strict parser."""
