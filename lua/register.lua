#!lua
--[[
Register a connection, make it its user's active one and displace the user's earlier ones.

A known sid is refreshed and keeps its game when it is the same user's and live; otherwise what had the sid is removed
first and reported as replaced (guarantee 4). A detached connection of the user within its grace is resumed: the new one
takes its seat, game and all. Of the user's other connections the expired ones go, then the oldest, until the new one
fits the limit; each of them is reported here and, being gone, nowhere else (guarantee 2). With reject_ms, the register
is refused instead while as many others as the limit allows were seen within that time.

First all is read, then the answer is kept for a call that is sent again, then all is written.

KEYS  conn, user_conns, last_seen, epoch, reply
ARGV  key_prefix, sid, user_id, conn_ttl_ms, key_lifetime_ms, connections_per_user,
      reject_ms (0 = the newest wins)
Reply the epoch, when the sid was new and the user had no other connection: then the new one is in no game, and
      connected and seen now; otherwise
      {now ms, 0 refused | 1 registered | 2 resumed, the connection (if refused, the newest that is alive), the replaced
      one or {}, the resumed one or {}, the displaced connections, oldest first}
      a connection = see read_connection
Cost  O(log N), N = connections in the namespace, for itself and for each connection that it displaces
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_us
-- @include next_epoch
-- @include read_connection
-- @include game_entry
-- @include remove_connection
-- @include earlier_answer
-- @include answer_once

local conn_key, user_conns_key, last_seen_key, epoch_key, reply_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local key_prefix, sid, user_id = ARGV[1], ARGV[2], ARGV[3]
local conn_ttl_ms, key_lifetime_ms = tonumber(ARGV[4]), ARGV[5]
local connections_per_user, reject_ms = tonumber(ARGV[6]), tonumber(ARGV[7])

local time = now_us()
local now = string.sub(time, 1, -4)
local oldest_live_ms = now - conn_ttl_ms

local function is_live(score)
  return tonumber(score) >= oldest_live_ms
end

local function is_detached(score)
  return -score >= tonumber(now)
end

-- Nobody is where the newest wins.
local function is_alive(score)
  return reject_ms > 0 and is_live(score) and tonumber(score) >= now - reject_ms
end

local function write(connection)
  local game_id, epoch, connected_at = connection[3], connection[4], connection[5]
  if connected_at == '' then
    redis.call('HSET', conn_key, 'user_id', user_id, 'game_id', game_id, 'epoch', epoch)
  else
    redis.call('HSET', conn_key, 'user_id', user_id, 'game_id', game_id, 'epoch', epoch, 'connected_at', connected_at)
  end
  redis.call('PEXPIRE', conn_key, key_lifetime_ms)
  redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
  redis.call('ZADD', user_conns_key, epoch, sid)
  redis.call('PEXPIRE', user_conns_key, key_lifetime_ms)
  if game_id ~= '' then
    local game_conns_key = key_prefix .. 'game_conns:' .. game_id
    redis.call('HSET', game_conns_key, sid, game_entry(connection))
    redis.call('PEXPIRE', game_conns_key, key_lifetime_ms)
  end
end

local others = redis.call('ZRANGE', user_conns_key, '0', '-1')
local epoch = next_epoch(epoch_key, time, key_lifetime_ms)

-- The first connection of a user, the most frequent case, has nothing to read but whether the sid is known, which the
-- command that inserts it tells.
if #others == 0 and epoch == time and redis.call('ZADD', last_seen_key, 'NX', now, sid) == 1 then
  local earlier = answer_once(reply_key, epoch)
  if earlier then
    redis.call('ZREM', last_seen_key, sid)
    return earlier
  end
  write({sid, user_id, '', epoch, '', '', now})
  return epoch
end

-- What has the sid now: this user's own connection, which is kept, or one to replace.
local scores = redis.call('ZMSCORE', last_seen_key, sid, unpack(others))
local connection = {sid, user_id, '', epoch, epoch == time and '' or now, '', now}
local kept, replaced, resumed
local own = scores[1] and read_connection(conn_key, sid, scores[1])
if own and own[2] == user_id and (is_live(own[7]) or is_detached(own[7])) then
  kept = own
  resumed = is_detached(own[7]) and own
  connection[3], connection[5] = own[3], own[5] ~= '' and own[5] or string.sub(own[4], 1, -4)
else
  replaced = own
end

-- The user's other connections, oldest first: how many count, who is alive, whose seat is there to be resumed.
local count, alive, seat_index = 1, {}, nil
for index, other in ipairs(others) do
  local score = scores[index + 1] or 0
  if other ~= sid and (is_live(score) or is_detached(score)) then
    count = count + 1
    if is_alive(score) then
      alive[#alive + 1] = index
    elseif is_detached(score) and not kept then
      seat_index = index
    end
  end
end
if #alive >= connections_per_user and (resumed or not kept) then
  local newest = alive[#alive]
  local refusing = read_connection(key_prefix .. 'conn:' .. others[newest], others[newest], scores[newest + 1])
  if refusing then
    return earlier_answer(reply_key) or {now, 0, refusing, {}, {}}
  end
  scores[newest + 1] = false -- Its record was evicted, so it is not alive.
end

local displaced, strays = {}, {}
if seat_index then
  resumed = read_connection(key_prefix .. 'conn:' .. others[seat_index], others[seat_index], scores[seat_index + 1])
  count = count - 1
  if resumed and resumed[2] == user_id then
    connection[3] = resumed[3]
  else
    resumed = nil
    strays[1] = others[seat_index]
  end
end
for index, other in ipairs(others) do
  local score = scores[index + 1] or 0
  local counts = is_live(score) or is_detached(score)
  local must_go = not counts or (count > connections_per_user and not is_alive(score))
  if must_go and other ~= sid and index ~= seat_index then
    local earlier = read_connection(key_prefix .. 'conn:' .. other, other, score)
    if earlier and earlier[2] == user_id then
      displaced[#displaced + 1] = earlier
    else
      -- The record was evicted, and may be another user's by now: only this entry is ours to drop.
      strays[#strays + 1] = other
    end
    if counts then
      count = count - 1
    end
  end
end

local answer = {now, resumed and 2 or 1, connection, replaced or {}, resumed or {}, unpack(displaced)}
local earlier = answer_once(reply_key, answer)
if earlier then
  return earlier
end

if replaced then
  remove_connection(key_prefix, last_seen_key, replaced)
end
if resumed and kept then
  redis.call('HDEL', conn_key, 'last_seen')
end
-- The new connection enters before others go, so that no key is deleted and made again in between.
redis.call('ZADD', last_seen_key, now, sid)
write(connection)
if resumed and not kept then
  remove_connection(key_prefix, last_seen_key, resumed)
end
for _, gone in ipairs(displaced) do
  remove_connection(key_prefix, last_seen_key, gone)
end
for _, stray in ipairs(strays) do
  redis.call('ZREM', user_conns_key, stray)
end
return answer
