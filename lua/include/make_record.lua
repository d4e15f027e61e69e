-- Put a record together; see split_record.
local function make_record(game_id, body)
  return #game_id .. ':' .. game_id .. body
end
