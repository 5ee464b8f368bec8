"""An OpenAI-compatible server over the generator, in process"""
