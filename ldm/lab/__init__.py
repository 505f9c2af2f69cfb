"""The laboratory: look inside a run (`watch`, `trace`), and be told what an exercise got wrong (`check`)."""
