//! What can be wrong with sled, and what that says of the rows on disk.

use super::OPEN_LIMIT;

/// What can be wrong with sled.
#[derive(Debug, thiserror::Error)]
pub(in crate::store) enum QueueError {
    /// An error of sled's own. The rows are as they were, as far as sled knows.
    #[error("sled: {0}")]
    Sled(#[from] sled::Error),
    /// sled panicked: its memory is not to be trusted any more.
    #[error("sled panicked: {0}")]
    Panicked(String),
    /// Opening hung.
    #[error("sled did not open within {} s", OPEN_LIMIT.as_secs())]
    Hung,
    /// A row does not read back.
    #[error("a row of sled's is damaged: {0}")]
    Damaged(&'static str),
    /// A file failed by itself.
    #[error("a file of the queue's: {0}")]
    Sync(#[from] std::io::Error),
}

impl QueueError {
    /// Whether a file could not be used, whatever is in it.
    pub(in crate::store) fn is_of_a_file(&self) -> bool {
        use std::io::ErrorKind::{InvalidData, UnexpectedEof};
        match self {
            QueueError::Sled(sled::Error::Io(error)) => !matches!(error.kind(), InvalidData | UnexpectedEof),
            QueueError::Sync(_) => true,
            QueueError::Sled(_) | QueueError::Panicked(_) | QueueError::Hung | QueueError::Damaged(_) => false,
        }
    }

    /// Whether this process may not, or cannot just now, open a file: that says nothing of what is in it.
    pub(in crate::store) fn is_of_this_process(&self) -> bool {
        use std::io::ErrorKind::{OutOfMemory, PermissionDenied, ReadOnlyFilesystem, WouldBlock};
        match self {
            QueueError::Sled(sled::Error::Io(error)) | QueueError::Sync(error) => {
                let has_no_descriptor = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE]
                    .iter()
                    .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
                has_no_descriptor
                    || matches!(error.kind(), OutOfMemory | PermissionDenied | ReadOnlyFilesystem | WouldBlock)
            }
            QueueError::Sled(_) | QueueError::Panicked(_) | QueueError::Hung | QueueError::Damaged(_) => false,
        }
    }

    /// Whether what is on disk does not read back: opening it again changes nothing.
    pub(in crate::store) fn is_damage(&self) -> bool {
        use std::io::ErrorKind::{InvalidData, UnexpectedEof};
        match self {
            QueueError::Damaged(_) | QueueError::Sled(sled::Error::Corruption { .. }) => true,
            QueueError::Sled(sled::Error::Io(error)) => matches!(error.kind(), InvalidData | UnexpectedEof),
            QueueError::Sled(_) | QueueError::Panicked(_) | QueueError::Hung | QueueError::Sync(_) => false,
        }
    }

    /// Whether it is only for want of space.
    pub(in crate::store) fn is_no_space(&self) -> bool {
        let is_full = |error: &std::io::Error| error.kind() == std::io::ErrorKind::StorageFull;
        match self {
            QueueError::Sled(sled::Error::Io(error)) | QueueError::Sync(error) => is_full(error),
            QueueError::Sled(_) | QueueError::Panicked(_) | QueueError::Hung | QueueError::Damaged(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_a_process_from_a_file_is_not_taken_for_damage() {
        use rustix::io::Errno;
        let cases = [
            (Errno::ACCESS, true),
            (Errno::PERM, true),
            // No thread for it, or its lock is held.
            (Errno::AGAIN, true),
            (Errno::MFILE, true),
            (Errno::NFILE, true),
            (Errno::NOMEM, true),
            (Errno::ROFS, true),
            (Errno::IO, false),
            (Errno::NOENT, false),
        ];
        for (errno, expected) in cases {
            for error in [QueueError::Sync(errno.into()), QueueError::Sled(sled::Error::Io(errno.into()))] {
                assert_eq!(error.is_of_this_process(), expected, "{error}");
                assert!(!error.is_damage());
            }
        }
        assert!(!QueueError::Damaged("").is_of_this_process());
    }
}
