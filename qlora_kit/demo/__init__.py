"""A page to try a run in the browser: one text, or a file of texts. It is made with Gradio (`qlora_kit[demo]`)."""
