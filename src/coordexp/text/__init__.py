"""From objects to token ids and back: coordinate vocabulary, prompts, codecs, grammar, strict parser."""
