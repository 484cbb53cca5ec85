//! Files that the config names.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::Secret;

/// Files that the config names, as they are read.
#[derive(Default)]
pub(super) struct Files {
    pub warnings: Vec<String>,
}

impl Files {
    /// A secret, inline or from a file, whose last line end does not count.
    pub(super) fn secret(
        &mut self,
        key: &str,
        inline: Option<String>,
        file: Option<PathBuf>,
    ) -> Result<Option<Secret>, String> {
        match (inline, file) {
            (Some(_), Some(_)) => Err(format!("{key}: give either {key} or {key}_file")),
            (Some(text), None) => Ok(Some(Secret::new(text))),
            (None, Some(path)) => {
                let path = expand(&path);
                let text = std::fs::read_to_string(&path)
                    .map_err(|error| format!("{key}_file: {}: {error}", path.display()))?;
                self.note_mode(&path);
                Ok(Some(Secret::new(text.trim_end_matches(['\r', '\n']).to_owned())))
            }
            (None, None) => Ok(None),
        }
    }

    /// Warns of a file with a secret that everybody can read.
    pub(super) fn note_mode(&mut self, path: &Path) {
        let mode = std::fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode());
        if mode & 0o007 != 0 {
            self.warnings.push(format!("{}: others may read it (mode {:o})", path.display(), mode & 0o777));
        }
    }
}

/// Puts systemd's credentials directory in; outside the service, where the unit's is.
pub(super) fn expand(path: &Path) -> PathBuf {
    const OF_THE_UNIT: &str = "/run/credentials/h5push-relay.service";
    match path.strip_prefix("$CREDENTIALS_DIRECTORY").or_else(|_| path.strip_prefix("${CREDENTIALS_DIRECTORY}")) {
        Ok(rest) => {
            let dir = std::env::var_os("CREDENTIALS_DIRECTORY").unwrap_or_else(|| OF_THE_UNIT.into());
            Path::new(&dir).join(rest)
        }
        Err(_) => path.to_owned(),
    }
}
