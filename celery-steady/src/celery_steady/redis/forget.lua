-- Deletes a message that was taken. KEYS: unacked, unacked_index, unacked_leases. ARGV: delivery tag.
redis.call('hdel', KEYS[1], ARGV[1])
redis.call('zrem', KEYS[2], ARGV[1])
redis.call('zrem', KEYS[3], ARGV[1])
