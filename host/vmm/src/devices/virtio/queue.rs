//! The loop that serves a request queue: take what the driver made available, answer, see whether there is more.

use std::io;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

/// Answers every available chain with `answer`, which returns the number of bytes it wrote (VIRTIO 1.2, 2.7.8).
/// True if the driver wants to be told. An error is a ring that cannot be served any further.
pub fn serve(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    mut answer: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> u32,
) -> io::Result<bool> {
    loop {
        queue
            .disable_notification(memory)
            .map_err(io::Error::other)?;
        // Not `pop_descriptor_chain`, which cannot tell a broken ring from an empty one: that would loop here.
        while let Some(chain) = queue.iter(memory).map_err(io::Error::other)?.next() {
            let head = chain.head_index();
            let written = answer(chain);
            queue
                .add_used(memory, head, written)
                .map_err(io::Error::other)?;
        }
        // 2.7.7.1 and 2.7.10: buffers that came between the last look and this line would get no kick.
        if !queue
            .enable_notification(memory)
            .map_err(io::Error::other)?
        {
            break;
        }
    }
    queue.needs_notification(memory).map_err(io::Error::other)
}
