"""Students as folders or LoRA files that diffusers alone loads and samples; `student.export_student` writes one."""
