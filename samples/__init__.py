"""The bundled sample: medical facts written for this project, and what renders them. No medical advice."""
